"""The one place that talks to MLflow: where the store is, its runs, and the run that a stage records in.

``store`` and ``run`` import mlflow, which takes seconds; ``tracker`` and ``uri`` do not.
"""
