"""How a stock model obeys: mechanics shared by all families. Nothing here knows a family or a method."""
