"""Two spirals, told apart by a fully connected DEQ: the smallest experiment."""
