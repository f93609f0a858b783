class NotRunClm(Exception):
    pass
