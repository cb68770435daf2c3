"""References: predictors of the label that cannot have memorized the image, one evidence type for all."""
