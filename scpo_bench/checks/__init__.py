"""Checks of agents and of SCPO itself: conformance, falsification, the oracle."""
