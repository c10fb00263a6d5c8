"""Results as tables and charts, and the pages that show them."""
