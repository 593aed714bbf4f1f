"""Pictures for readers: kept tokens drawn over images, plots, pages, the demo."""
