"""The planner: instance configurations as columns, an integer program that buys nodes, and its explanation."""
