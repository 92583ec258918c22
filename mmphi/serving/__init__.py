"""Interfaces to trained models: terminal, HTTP server, web page, MLflow and lmms-eval."""
