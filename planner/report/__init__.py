"""What people look at: the results table, pictures, and the self-contained HTML report."""
