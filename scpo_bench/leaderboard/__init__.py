"""From records to tables, plots and pages: metrics of one run, statistics over seeds, tables, and
what shows them.

Everything here reads records only; it imports no agent, no environment and no torch.
"""
