"""The scores and their top K in bounded memory."""
