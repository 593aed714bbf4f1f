"""Around the decoder's layers and their attention."""
