"""What a round of 747,000 trees costs where it is committed, selected from and trained on."""
