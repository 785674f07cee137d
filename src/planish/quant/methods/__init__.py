"""One paper a file: an article, its steps, one preset."""
