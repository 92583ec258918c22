"""Module names in models that earlier versions have stored; nothing else is here."""
