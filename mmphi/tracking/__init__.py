"""All access to MLflow: the location of the store, its runs, and recording in a run.

``run_store``, ``run_writer`` and ``run_tracker`` import mlflow, which takes seconds; ``tracker`` and ``uri`` do not.
"""
