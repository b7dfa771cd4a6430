"""The asynchronous SDK, written by hand. scripts/unasync.py derives `_sync` from the files of this
package."""
