"""Small random models, files and folders, made in the test."""
