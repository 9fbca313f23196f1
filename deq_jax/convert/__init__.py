"""Published PyTorch weights as parameters of our models.  Only this package may need torch."""
