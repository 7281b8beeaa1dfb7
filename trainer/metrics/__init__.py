"""What an epoch accumulates: totals, metrics, their single synchronisation, the best epoch."""
