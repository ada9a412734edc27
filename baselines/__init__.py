"""The agents that SCPO is compared with: PPO-Lagrangian, CPO and CVPO."""
