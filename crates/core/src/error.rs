//! The one error at every boundary between engine, drivers, repository and depots.
//!
//! Whoever meets a failure first classifies it, because only there the facts are known; layers
//! above retry or give up by [`Status`] alone. `Display` prints one sentence and never the source:
//! the CLI walks the chain and prints each cause on its own line.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Shorthand for results that carry an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a caller may want to tell cases apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// The configuration or an argument cannot be used as it is.
    Config,
    /// Wrong password, key or credential.
    Unauthenticated,
    /// The credential is right, but a privilege is missing.
    PermissionDenied,
    /// Something that must be there is absent.
    NotFound,
    /// Something that must not be there is present.
    AlreadyExists,
    /// A condition attached to a write does not hold: someone else was faster.
    Conflict,
    /// Another run, lock or lease holds what is needed.
    Locked,
    /// The version, format or feature is not supported.
    Unsupported,
    /// Bytes are not what they must be: damaged, forged or truncated.
    Corrupt,
    /// A pin no longer shows what it showed at the cut.
    PinLost,
    /// The fence found the source, or a foreign stamp, where the target should be.
    Fenced,
    /// A check of ours came out negative: references, verification, an oracle.
    Unproven,
    /// A budget, quota, disk or memory limit is used up.
    Exhausted,
    /// A deadline passed.
    TimedOut,
    /// The service asks to be called less often.
    RateLimited,
    /// The peer cannot be reached or broke the connection.
    Unreachable,
    /// The operator or a peer asked to stop.
    Cancelled,
    /// A file system or device error that fits nothing above.
    Io,
    /// A bug of ours: an invariant does not hold.
    Internal,
}

/// Whether trying again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Trying again cannot help until someone changes something.
    Permanent,
    /// Trying again is likely to help.
    Temporary,
    /// Was temporary, and stayed so for as long as the retry layer was allowed to try.
    Persistent,
}

/// One failure: what was attempted, on what, why it failed and what to do about it.
///
/// Build with the constructors and the chained setters:
/// `Error::new(Kind::PermissionDenied, "may not read schema `billing`").operation("prepare")`.
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    kind: Kind,
    status: Status,
    operation: Option<String>,
    store: Option<String>,
    message: String,
    hint: Option<String>,
    context: Vec<(&'static str, String)>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A permanent error of `kind`; `message` is one sentence without a full stop.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            inner: Box::new(Inner {
                kind,
                status: Status::Permanent,
                operation: None,
                store: None,
                message: message.into(),
                hint: None,
                context: Vec::new(),
                source: None,
            }),
        }
    }

    /// Classifies an error of the operating system: full disk, missing file, denied, the rest.
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as E;
        let (kind, status) = match source.kind() {
            E::NotFound => (Kind::NotFound, Status::Permanent),
            E::AlreadyExists => (Kind::AlreadyExists, Status::Permanent),
            E::PermissionDenied | E::ReadOnlyFilesystem => (Kind::PermissionDenied, Status::Permanent),
            E::StorageFull | E::QuotaExceeded | E::OutOfMemory | E::FileTooLarge => {
                (Kind::Exhausted, Status::Permanent)
            }
            E::TimedOut => (Kind::TimedOut, Status::Temporary),
            E::Interrupted | E::WouldBlock => (Kind::Io, Status::Temporary),
            E::ConnectionRefused
            | E::ConnectionReset
            | E::ConnectionAborted
            | E::BrokenPipe
            | E::NotConnected
            | E::HostUnreachable
            | E::NetworkUnreachable
            | E::NetworkDown => (Kind::Unreachable, Status::Temporary),
            E::UnexpectedEof | E::InvalidData => (Kind::Corrupt, Status::Permanent),
            _ => (Kind::Io, Status::Permanent),
        };
        Self::new(kind, message).status(status).source(source)
    }

    /// A bug of ours; the message says which invariant does not hold.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message).hint("this is a bug in stillpoint, please report it")
    }

    /// Replaces the status.
    #[must_use]
    pub fn status(mut self, status: Status) -> Self {
        self.inner.status = status;
        self
    }

    /// Marks the error as worth a retry.
    #[must_use]
    pub fn temporary(self) -> Self {
        self.status(Status::Temporary)
    }

    /// Names what was attempted, e.g. `prepare`; the innermost name wins.
    #[must_use]
    pub fn operation(mut self, operation: impl Into<String>) -> Self {
        self.inner.operation.get_or_insert(operation.into());
        self
    }

    /// Names the store concerned; the innermost name wins.
    #[must_use]
    pub fn store(mut self, store: impl Into<String>) -> Self {
        self.inner.store.get_or_insert(store.into());
        self
    }

    /// Says what the operator can do; the innermost hint wins.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint.get_or_insert(hint.into());
        self
    }

    /// Adds a named fact, printed behind the message.
    #[must_use]
    pub fn context(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.inner.context.push((name, value.to_string()));
        self
    }

    /// Attaches the cause.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.inner.source = Some(source.into());
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> Kind {
        self.inner.kind
    }

    /// Whether a retry can help.
    pub fn is_temporary(&self) -> bool {
        self.inner.status == Status::Temporary
    }

    /// The status as it stands.
    pub fn status_value(&self) -> Status {
        self.inner.status
    }

    /// What was attempted, if named.
    pub fn operation_name(&self) -> Option<&str> {
        self.inner.operation.as_deref()
    }

    /// The store concerned, if named.
    pub fn store_name(&self) -> Option<&str> {
        self.inner.store.as_deref()
    }

    /// What the operator can do, if known.
    pub fn hint_text(&self) -> Option<&str> {
        self.inner.hint.as_deref()
    }

    /// The bare message, without store, operation and context.
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// The named facts, in the order in which they were added.
    pub fn facts(&self) -> &[(&'static str, String)] {
        &self.inner.context
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(store) = &self.inner.store {
            write!(f, "store `{store}`: ")?;
        }
        f.write_str(&self.inner.message)?;
        for (name, value) in &self.inner.context {
            write!(f, ", {name} {value}")?;
        }
        if let Some(operation) = &self.inner.operation {
            write!(f, " ({operation})")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{:?}: {self}", self.inner.kind, self.inner.status)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, "\n  caused by: {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_deref().map(|source| source as _)
    }
}

/// Adds a message to a foreign result while it is turned into an [`Error`].
pub trait IoContext<T> {
    /// Classifies the I/O error and says what was attempted.
    fn or_io(self, message: impl FnOnce() -> String) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn or_io(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::io(message(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_store_facts_and_operation_but_never_the_source() {
        let cause = std::io::Error::other("deep cause");
        let error = Error::io("cannot read the table list", cause)
            .store("meta")
            .context("schema", "billing")
            .operation("prepare");
        assert_eq!(error.to_string(), "store `meta`: cannot read the table list, schema billing (prepare)");
        assert!(format!("{error:?}").contains("caused by: deep cause"));
    }

    #[test]
    fn innermost_store_operation_and_hint_win() {
        let error = Error::new(Kind::Config, "x").store("inner").operation("cut").hint("first");
        let error = error.store("outer").operation("run").hint("second");
        assert_eq!(error.store_name(), Some("inner"));
        assert_eq!(error.operation_name(), Some("cut"));
        assert_eq!(error.hint_text(), Some("first"));
    }

    #[test]
    fn a_full_disk_is_exhausted_and_permanent() {
        let error = Error::io("w", std::io::Error::from(std::io::ErrorKind::StorageFull));
        assert_eq!((error.kind(), error.is_temporary()), (Kind::Exhausted, false));
    }
}
