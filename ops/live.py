"""scaffold"""


class LiveView:
    def __init__(self, out, console=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass

    def refresh(self):
        pass
