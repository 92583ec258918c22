"""Work that many machines share: what Ray knows of them, and what is given to them."""
