"""What a strategy makes of a module and its optimizer: the one place where strategies differ in training."""
