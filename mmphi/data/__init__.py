"""Reading, drawing and storing what models are trained on."""
