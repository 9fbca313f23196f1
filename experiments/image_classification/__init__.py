"""Image classification by convolutional DEQs."""
