"""The agents that SCPO is compared with."""
