"""The synthetic regression task of the Jacobian regularisation paper."""
