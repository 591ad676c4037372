//! Logging in: who we are, and the proof of it.
//!
//! SCRAM is bound to the TLS connection where there is one; a password goes in clear text over nothing
//! that others could read.

use postgres_protocol::authentication::{self, sasl};
use postgres_protocol::message::frontend;
use stillpoint_core::error::{Error, Kind, Result};

use super::super::wire::{self, ServerMessage};
use super::{Session, unsendable};

impl Session {
    /// Greets the server and proves who we are; afterwards it takes queries.
    pub(super) fn log_in(&mut self) -> Result<()> {
        let user = self.endpoint.user.clone();
        let database = self.database.clone();
        let parameters = [
            ("user", user.as_str()),
            ("database", database.as_str()),
            ("application_name", "stillpoint"),
            ("client_encoding", "UTF8"),
        ];
        frontend::startup_message(parameters, &mut self.output).map_err(unsendable)?;
        self.send()?;
        let what = format!("cannot log in to {} as `{user}`, database `{database}`", self.endpoint.address);
        loop {
            let (tag, body) = self.message()?;
            match tag {
                b'R' => {
                    let body = self.input[body].to_vec();
                    self.authenticate(&body)?;
                }
                b'K' => {
                    let key = <[u8; 8]>::try_from(&self.input[body]).map_err(|_| wire::garbled())?;
                    self.process = i32::from_be_bytes([key[0], key[1], key[2], key[3]]);
                    self.secret = i32::from_be_bytes([key[4], key[5], key[6], key[7]]);
                }
                b'E' => {
                    self.usable = false;
                    return Err(ServerMessage::parse(&self.input[body]).into_error(what));
                }
                b'Z' => return Ok(()),
                b'v' => {}
                _ => return Err(wire::garbled()),
            }
        }
    }

    fn authenticate(&mut self, body: &[u8]) -> Result<()> {
        let (kind, data) = body.split_first_chunk::<4>().ok_or_else(wire::garbled)?;
        let user = self.endpoint.user.clone();
        match u32::from_be_bytes(*kind) {
            0 => Ok(()),
            3 if !self.stream.is_private() => {
                Err(Error::new(Kind::Unauthenticated, "the server asks for the password in clear text")
                    .hint("use `tls: require` or better, or scram-sha-256 in pg_hba.conf"))
            }
            3 => {
                let password = self.password()?;
                frontend::password_message(password.as_bytes(), &mut self.output).map_err(unsendable)?;
                self.send()
            }
            5 => {
                let salt = <[u8; 4]>::try_from(data).map_err(|_| wire::garbled())?;
                let hash = authentication::md5_hash(user.as_bytes(), self.password()?.as_bytes(), salt);
                frontend::password_message(hash.as_bytes(), &mut self.output).map_err(unsendable)?;
                self.send()
            }
            10 => self.authenticate_scram(data),
            other => Err(Error::new(Kind::Unsupported, format!("the server asks for login method {other}"))
                .hint("scram-sha-256, md5 and password are supported in pg_hba.conf")),
        }
    }

    fn authenticate_scram(&mut self, mechanisms: &[u8]) -> Result<()> {
        let offered: Vec<&[u8]> = mechanisms.split(|&byte| byte == 0).collect();
        let offers = |name: &str| offered.contains(&name.as_bytes());
        let binding = self.stream.channel_binding();
        let (mechanism, binding) = match binding {
            Some(hash) if offers(sasl::SCRAM_SHA_256_PLUS) => {
                (sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(hash))
            }
            // Says that we could have, so that nobody between us can hide the server's offer.
            Some(_) => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested()),
            None => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
        };
        if !offers(mechanism) {
            return Err(Error::new(Kind::Unsupported, "the server offers no SCRAM-SHA-256"));
        }
        let forged = |error: std::io::Error| {
            Error::new(Kind::Unauthenticated, "the server did not prove that it knows the password").source(error)
        };
        let mut scram = sasl::ScramSha256::new(self.password()?.as_bytes(), binding);
        frontend::sasl_initial_response(mechanism, scram.message(), &mut self.output).map_err(unsendable)?;
        self.send()?;
        let challenge = self.sasl_message(11)?;
        scram.update(&challenge).map_err(forged)?;
        frontend::sasl_response(scram.message(), &mut self.output).map_err(unsendable)?;
        self.send()?;
        let proof = self.sasl_message(12)?;
        scram.finish(&proof).map_err(forged)
    }

    fn sasl_message(&mut self, expected: u32) -> Result<Vec<u8>> {
        let (tag, body) = self.message()?;
        match (tag, self.input[body.clone()].split_first_chunk::<4>()) {
            (b'R', Some((kind, data))) if u32::from_be_bytes(*kind) == expected => Ok(data.to_vec()),
            (b'E', _) => {
                self.usable = false;
                let what = format!("cannot log in to {} as `{}`", self.endpoint.address, self.endpoint.user);
                Err(ServerMessage::parse(&self.input[body]).into_error(what))
            }
            _ => Err(wire::garbled()),
        }
    }

    fn password(&self) -> Result<String> {
        self.endpoint.password.clone().ok_or_else(|| {
            Error::new(Kind::Unauthenticated, format!("the server asks for a password of `{}`", self.endpoint.user))
                .hint("password: env:NAME, or file:/path")
        })
    }
}
