"""What a study found: read from its folder, told as words, figures, a page, and to MLflow."""
