"""What two or more phases share. Small functions, no base trainer."""
