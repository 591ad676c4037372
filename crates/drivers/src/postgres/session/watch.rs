//! What a session does while it waits: it looks whether someone asked to stop, whether its time is over, and
//! whether the server still knows of it.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use stillpoint_core::error::{Error, Kind, Result};

use super::Session;
use crate::postgres::endpoint::open;

/// After so long without a word the server is asked, over another connection, whether it still works on
/// ours: a network that drops packets without a word would be waited for until the end of days.
const SILENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 60 });
impl Session {
    /// Called while waiting: someone may have asked to stop, or the limit is over.
    pub(super) fn look(&mut self, since: Instant) -> Result<()> {
        if let Err(stop) = self.context.check() {
            self.usable = false;
            // A failed request leaves the server to notice that the connection is closed.
            drop(self.cancel_request());
            return Err(stop);
        }
        if self.limit.is_some_and(|limit| since.elapsed() > limit) {
            self.usable = false;
            return Err(Error::new(Kind::TimedOut, format!("{} does not answer", self.endpoint.address)).temporary());
        }
        let silences = since.elapsed().as_secs() / SILENCE.as_secs();
        if silences > std::mem::replace(&mut self.asked, silences) && self.limit.is_none() {
            let (is_there, waits_for_us) = self.other_end();
            // Both ends wait for each other: what one sent never came, and nobody will say so. Asked twice,
            // because an answer may be on its way.
            if !is_there || (std::mem::replace(&mut self.waits_for_us, waits_for_us) && waits_for_us) {
                self.usable = false;
                return Err(self.lost());
            }
        }
        Ok(())
    }

    /// Whether the server still has our session, and whether that waits for us, as another one sees it. Where
    /// that cannot be told, for want of connections, it is believed to be at work.
    fn other_end(&self) -> (bool, bool) {
        let ask = || {
            let mut other = Self::connect(&self.endpoint, &self.database, &self.context)?;
            other.limit = Some(self.endpoint.connect_time_max);
            other.query(&format!(
                "SELECT coalesce(wait_event_type = 'Client', false) FROM pg_catalog.pg_stat_activity WHERE pid = {}",
                self.process
            ))
        };
        match ask() {
            Ok(rows) => (!rows.is_empty(), rows.first().is_some_and(|row| row.truth(0))),
            Err(error) => (!matches!(error.kind(), Kind::Unreachable | Kind::TimedOut), false),
        }
    }

    pub(super) fn lost(&self) -> Error {
        Error::new(Kind::Unreachable, format!("lost the connection to {}", self.endpoint.address))
            .temporary()
            .hint("the server's log says why: a restart, a session that was ended, or the network")
    }

    /// Asks the server to stop what the session does. The session itself hears of it as an error.
    pub(super) fn cancel_request(&self) -> Result<()> {
        let mut stream = open(&self.endpoint, Instant::now() + self.endpoint.connect_time_max)?;
        let mut request = BytesMut::new();
        frontend::cancel_request(self.process, self.secret, &mut request);
        let sent = stream.write_all(&request).and_then(|()| stream.flush());
        sent.map_err(|error| Error::io("cannot ask the server to stop", error))?;
        // The server closes when it has taken the request; without waiting it may come too late.
        stream.set_patience(Duration::from_secs(2)).map_err(|error| Error::io("cannot wait for the server", error))?;
        match stream.read(&mut [0; 1]) {
            Ok(_) | Err(_) => Ok(()),
        }
    }
}
