"""The app as a Hugging Face Space, and `python app/app.py`: open to others, so nothing is theirs
to load but the embedded models."""

from guidancekit.app import launch

if __name__ == "__main__":
    launch(host="0.0.0.0", public=True)
