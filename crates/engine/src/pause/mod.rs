//! Holding writers back, and letting them go again.
//!
//! A platform's pause steps become [`Act`]s: plain data with every secret resolved, so that the
//! engine and the watchdog, which gets them over a pipe, perform exactly the same thing. Every act
//! may be performed twice. Nothing here decides when; that is the coordinator's.

mod command;
mod http;
mod sql;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::id::StoreName;
use stillpoint_core::platform::{PauseStep, Secret, Store};

use crate::secrets;

pub(crate) use command::kill_group;
pub(crate) use http::names_a_secret;
pub use sql::{Databases, OpenDatabase};

/// Bytes of a hook's answer or output that an error shows at most.
const SHOWN_BYTES_MAX: usize = 400;

/// One thing to do, complete.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// Calls an HTTP endpoint.
    Http {
        /// Where.
        url: String,
        /// The method.
        method: String,
        /// Headers; values may be secret.
        headers: BTreeMap<String, String>,
        /// The body, sent as it is.
        body: Option<String>,
        /// Status codes that mean success; empty for any 2xx.
        expect: Vec<u16>,
    },
    /// Runs a program.
    Command {
        /// Program and arguments.
        words: Vec<String>,
    },
    /// Runs a statement through a store's driver.
    Sql {
        /// The store.
        store: StoreName,
        /// The statement.
        statement: String,
    },
}

impl fmt::Debug for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Act({self})")
    }
}

impl fmt::Display for Act {
    /// What an operator recognises, without headers and bodies.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http { url, method, .. } => write!(f, "{method} {}", without_credentials(url)),
            Self::Command { words } => f.write_str(&words.join(" ")),
            Self::Sql { store, .. } => write!(f, "the statement on store `{store}`"),
        }
    }
}

fn without_credentials(text: &str) -> String {
    match url::Url::parse(text) {
        Ok(mut url) => {
            let cleaned = url.set_password(None).is_ok() && url.set_username("").is_ok();
            url.set_query(None);
            if cleaned { url.to_string() } else { "the hook".to_owned() }
        }
        Err(_) => "the hook".to_owned(),
    }
}

/// A pause step with its undo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Holds writers back.
    pub pause: Act,
    /// Lets them go.
    pub resume: Act,
}

impl Step {
    /// Resolves the secrets of a configured step. `index` counts from 0 and is for errors.
    pub fn resolve(index: usize, step: &PauseStep, secrets: &dyn Fn(&Secret) -> Result<String>) -> Result<Self> {
        let named = |error: Error| error.operation(format!("pause step {}", index + 1));
        let (pause, resume) = match step {
            PauseStep::Http { pause, resume } => {
                (http::resolve(pause, secrets).map_err(named)?, http::resolve(resume, secrets).map_err(named)?)
            }
            PauseStep::Command { pause, resume } => {
                (command::checked(pause).map_err(named)?, command::checked(resume).map_err(named)?)
            }
            PauseStep::Sql { store, pause, resume } => {
                let act = |statement: &String| Act::Sql { store: store.clone(), statement: statement.clone() };
                (act(pause), act(resume))
            }
        };
        Ok(Self { pause, resume })
    }
}

/// Resolves all pause steps of a platform, in order.
pub fn resolve_steps(steps: &[PauseStep], secrets: &dyn Fn(&Secret) -> Result<String>) -> Result<Vec<Step>> {
    steps.iter().enumerate().map(|(index, step)| Step::resolve(index, step, secrets)).collect()
}

/// The databases that the steps speak to.
pub fn databases_of(steps: &[PauseStep], stores: &BTreeMap<StoreName, Store>) -> BTreeMap<StoreName, Store> {
    let named = steps.iter().filter_map(|step| match step {
        PauseStep::Sql { store, .. } => stores.get_key_value(store),
        _ => None,
    });
    named.map(|(name, store)| (name.clone(), store.clone())).collect()
}

/// Told the process group of a command while it runs, and `None` once it ended: so that a watchdog
/// can stop it if the engine dies meanwhile.
pub type GroupWatcher<'a> = &'a (dyn Fn(Option<u32>) + Send + Sync);

/// Performs acts.
#[derive(Debug)]
pub struct Performer {
    client: reqwest::Client,
    databases: Arc<Databases>,
}

impl Performer {
    /// A performer that reaches databases through `databases`.
    pub fn new(databases: Databases) -> Result<Self> {
        Ok(Self { client: http::client()?, databases: Arc::new(databases) })
    }

    /// Performs `act` and returns how long it took. Fails with `TimedOut` after `time_out`; whether
    /// the act had an effect is unknown then, and after any temporary error.
    pub async fn perform(&self, act: &Act, time_out: Duration, group: GroupWatcher<'_>) -> Result<Duration> {
        let began = Instant::now();
        let work = async {
            match act {
                Act::Http { url, method, headers, body, expect } => {
                    http::call(&self.client, url, method, headers, body.as_deref(), expect).await
                }
                Act::Command { words } => command::run(words, group).await,
                Act::Sql { store, statement } => self.databases.execute(store, statement).await,
            }
        };
        match tokio::time::timeout(time_out, work).await {
            Ok(result) => result.map(|()| began.elapsed()),
            Err(_) => Err(Error::new(Kind::TimedOut, format!("{act} did not end within {} ms", time_out.as_millis()))
                .hint("writers are let go; make the hook faster, or raise cut.pauseBudget")),
        }
    }
}

impl Performer {
    /// Waits until no statement of an act that was left at its time-out runs any more; `false` if one
    /// still does after `within`. What an HTTP endpoint still does is not known here.
    pub async fn settled(&self, within: Duration) -> bool {
        self.databases.settled(within).await
    }
}

/// The head of a text that a hook gave back, on one line.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(SHOWN_BYTES_MAX) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// A header value: a secret reference is resolved, anything else stands for itself.
fn resolved(value: &str, secrets: &dyn Fn(&Secret) -> Result<String>) -> Result<String> {
    if secrets::is_reference(value) { secrets(&Secret(value.to_owned())) } else { Ok(value.to_owned()) }
}
