"""What is looked at: kept tokens over pictures, plots, pages, the demo."""
