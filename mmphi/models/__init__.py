"""Language models, vision encoders, audio, projectors, and the models joined from them."""
