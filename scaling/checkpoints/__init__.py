"""Trained models as people have them: does the default settle on them?"""
