"""What leaves the store for other tools: folders of files, written beside their place and renamed into it."""
