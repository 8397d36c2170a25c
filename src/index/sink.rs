//! Where entries go, and small sinks for them.

use super::entry::Entry;
use super::error::IndexError;

/// Takes the entries of a layer one after the other, in the tar's order.
pub trait EntrySink {
    /// Takes one entry. An error stops the walk and is handed to its caller.
    ///
    /// # Errors
    /// Whatever the sink cannot take.
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError>;
}

/// Hands every entry to two sinks, the first one first.
#[derive(Debug)]
pub struct Tee<A, B>(pub A, pub B);

impl<A: EntrySink, B: EntrySink> EntrySink for Tee<A, B> {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        self.0.entry(entry)?;
        self.1.entry(entry)
    }
}

/// Keeps all entries in memory, which is for tests and small layers.
#[derive(Clone, Debug, Default)]
pub struct Collector(pub Vec<Entry>);

impl EntrySink for Collector {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        self.0.push(entry.clone());
        Ok(())
    }
}

impl<S: EntrySink + ?Sized> EntrySink for &mut S {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        (**self).entry(entry)
    }
}

impl<S: EntrySink> EntrySink for Option<S> {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        match self {
            Some(sink) => sink.entry(entry),
            None => Ok(()),
        }
    }
}
