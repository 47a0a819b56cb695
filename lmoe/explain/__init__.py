"""What each expert does to a text: the numbers, and the page, file and table that show them."""
