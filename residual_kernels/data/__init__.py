"""What a user hands in by name: models, images and class names."""
