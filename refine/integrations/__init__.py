"""The method inside other people's training code."""
