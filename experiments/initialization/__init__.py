"""Initial weights that a DEQ can be trained from: what theory predicts and what training shows."""
