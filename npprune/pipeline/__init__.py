"""The stages, end to end: discover -> plan -> prune -> evaluate -> export -> report.

The only room that brings models, data, store, export and report together. Stages say what they do
through events; they neither print nor ask.
"""
