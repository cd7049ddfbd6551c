"""Making the pictures of a plan, and the files that they are kept in."""
