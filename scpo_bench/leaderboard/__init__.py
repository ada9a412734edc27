"""From records to leaderboards: metrics, statistics, columns, tables, figures and the page.

Everything here reads records only; it imports no agent, no environment and no torch.
"""
