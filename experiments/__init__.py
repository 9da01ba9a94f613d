"""Reproductions of published figures, outside the product: nothing in the product imports them."""
