"""Former module names, which models stored by earlier versions refer to."""
