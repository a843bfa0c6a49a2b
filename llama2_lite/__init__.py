"""Llama 2, rebuilt: one module for each chapter of the book, of the same name."""
