"""What stays and what is refitted: statistics, criteria, measured harm, budgets, compensation."""
