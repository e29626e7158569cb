"""timm's and foreign vision transformers: loading, the view of the mathematics, surgery.

The only room that calls `timm.create_model`. Importing this package loads nothing heavy; its
modules load torch and timm.
"""
