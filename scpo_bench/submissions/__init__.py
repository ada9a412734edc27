"""Records of others: bundles, their verification, and running their cells again."""
